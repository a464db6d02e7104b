"""The kill matrix: every mutant and every correct variant against every check that reads its file.

`python -m fa_reference.grading.kill_matrix` prints it, says which mutants survive and which correct variants fail, and
with --write keeps it in results/kill_matrix_DEVICE.json, from which the page beside the mutants is made.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from fa_reference.bench.record import RESULTS, slug
from fa_reference.course import CHAPTERS
from fa_reference.grading.kill_page import SOMETIMES, write_page
from fa_reference.grading.mutants import ANYWHERE, BadMutant, Patched, read_answers
from fa_reference.grading.report import NOT_GRADED
from fa_reference.grading.trials import Trial, problem, run_apart

# Starting a process costs some seconds, losing one costs its answers.
SHARE = 40


def device_name() -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def record_path(device: str) -> Path:
    """Where the matrix of a device is kept."""
    return RESULTS / f"kill_matrix_{slug(device)}.json"


def run_matrix(
    answers: Sequence[Patched], everything: bool, jobs: int, timed: bool | None = None
) -> Iterator[tuple[Patched, list[Trial]]]:
    """Every answer with its trials, as they come; a process takes up to SHARE answers of one chapter.

    timed: only the checks that measure time, or only the others (an answer without such a check is left out).
    """
    parts = []
    for number in sorted({a.where_it_lives.number for a in answers}):
        labels = [a.label for a in answers if a.where_it_lives.number == number]
        share = min(SHARE, max(1, -(-len(labels) // jobs)))
        parts += [(number, labels[i : i + share], everything, timed) for i in range(0, len(labels), share)]
    waiting = {key(a): a for a in answers}
    for done in run_apart(parts, jobs):
        for name in dict.fromkeys(f"{t.chapter} {t.answer}" for t in done):
            yield waiting.pop(name), [t for t in done if f"{t.chapter} {t.answer}" == name]
    for answer in waiting.values() if timed is None else ():  # no check of this name
        yield answer, []


def key(answer: Patched) -> str:
    """`chapter label`: unique in the course."""
    return f"{answer.where_it_lives.number} {answer.label}"


def entry(answer: Patched, runs: Sequence[Sequence[Trial]], every_check: bool) -> dict[str, Any]:
    """What is recorded of one answer: the state of every check that ran, and whether it was judged alike in every run.

    Inputs are new in every run, so a check that is not about a bug may meet it in some runs only: SOMETIMES.
    """
    first = runs[0]
    today = datetime.now(UTC).date().isoformat()
    states: dict[str, str] = {}
    for t in (t for run in runs for t in run):
        name = f"{t.checked_in}: {t.check}"
        states[name] = t.state if states.get(name, t.state) == t.state else SOMETIMES
    own = next((t for t in first if (t.checked_in, t.check) == (answer.checked_in, answer.check)), None)
    return {
        "chapter": answer.where_it_lives.number,
        "answer": answer.label,
        "digest": digest(answer),
        "bug": answer.bug,
        "where": answer.where,
        "check": f"{answer.checked_in}: {answer.check}" if answer.is_mutant else "",
        "states": states,
        "message": own.message if own else "",
        "problem": problem(answer, first),
        "date": today,
        "torch": torch.__version__,
        "every_check": every_check or not answer.is_mutant,
        "repetitions": len(runs),
        "same_in_every_run": judged_alike(answer.is_mutant, f"{answer.checked_in}: {answer.check}", states),
    }


def judged_alike(is_mutant: bool, check: str, states: dict[str, str]) -> bool:
    """True if the verdict was the same in every run: of a mutant its own check's, of a variant every check's."""
    return SOMETIMES not in ([states.get(check)] if is_mutant else states.values())


def merge(measured: dict[str, Any]) -> Path:
    """Add a measurement (as main writes it) to its device's record.

    Runs of an answer that has not changed are put together; answers that no longer exist are left out, and mutants that
    are judged by another check now.
    """
    path = record_path(measured["device"])
    known = {key(a): a for c in CHAPTERS for a in read_answers(c.number)}
    kept: dict[str, dict[str, Any]] = {}
    for e in [
        *(json.loads(path.read_text(encoding="utf-8"))["answers"] if path.exists() else []),
        *measured["answers"],
    ]:
        name = f"{e['chapter']} {e['answer']}"
        answer = known.get(name)
        own = f"{answer.checked_in}: {answer.check}" if answer and answer.is_mutant else ""
        if answer and e["digest"] == digest(answer) and e["check"] == own:
            kept[name] = together(kept[name], e) if name in kept else e
    ordered = [kept[name] for name in known if name in kept]
    for e in ordered:  # the words that a mutant asks for may have been made clearer since
        e["problem"] = problem(known[f"{e['chapter']} {e['answer']}"], trials_of(e))
    data = {"schema_version": 1, "device": measured["device"], "answers": ordered}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def together(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two entries of the same answer as one: the newer message, all checks that ran, the runs added up.

    Without a check in common they are parts of a run, such as those that measure time and the others.
    """
    states = {**old["states"], **new["states"]}
    states |= {c: SOMETIMES for c, state in old["states"].items() if state != states[c]}
    counts = (old["repetitions"], new["repetitions"])
    return {
        **new,
        "states": states,
        "every_check": old["every_check"] or new["every_check"],
        "repetitions": max(counts) if old["states"].keys().isdisjoint(new["states"]) else sum(counts),
        "same_in_every_run": judged_alike(bool(new["bug"]), new["check"], states),
    }


def digest(answer: Patched) -> str:
    """Identifies the patched file."""
    return sha256(answer.source().encode()).hexdigest()[:12]


def trials_of(e: dict[str, Any]) -> list[Trial]:
    """The trials that an entry was made from."""
    split = [(check.split(": ", 1), state) for check, state in e["states"].items()]
    return [
        Trial(e["chapter"], e["answer"], name, file, state, e["message"] if f"{file}: {name}" == e["check"] else "", 0)
        for (file, name), state in split
    ]


def _show(answer: Patched, e: dict[str, Any], trials: Sequence[Trial], talkative: bool) -> None:
    killers = [t for t in trials if t.kills]
    not_here = e["states"].get(e["check"]) == NOT_GRADED
    mark = "✗" if e["problem"] else "–" if not_here else "✓"
    kind = "mutant" if answer.is_mutant else "variant"
    print(
        f"{mark} {answer.where_it_lives.number} {kind} {answer.label}: {len(killers)} of {len(trials)} checks fail",
        flush=True,
    )
    if e["problem"]:
        print(f"    {e['problem']}")
    for t in killers if talkative else ():
        print(f"    [{t.checked_in}: {t.check}] {t.message}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if every answer was judged as it should be, in every repetition; 1 if not, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="kill_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--chapter", type=int, nargs="*", help="only these chapters")
    parser.add_argument("--only", nargs="*", default=[""], help="only answers with one of these texts in `file: name`")
    parser.add_argument("--without", nargs="*", default=[], help="without answers that have one of these texts in it")
    parser.add_argument("--where", nargs="*", help="only mutants seen there: any, gpu, hopper")
    parser.add_argument("--variants", action="store_true", help="only correct variants, no mutants")
    parser.add_argument(
        "--timed", action="store_true", help="only checks that measure time; on a GPU, several jobs leave them out"
    )
    parser.add_argument("--quick", action="store_true", help="each mutant runs only the check that must kill it")
    parser.add_argument("--repeat", type=int, default=1, help="run all of it so many times")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--messages", action="store_true", help="print what each failing check says")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--write", action="store_true", help="keep the result in results/ and make the page")
    parser.add_argument("--merge", type=Path, nargs="*", help="run nothing: keep these files of --json in results/")
    options = parser.parse_args(arguments)
    if options.merge is not None:
        for path in options.merge:
            print(f"wrote {merge(json.loads(path.read_text(encoding='utf-8')))}")
        print(f"wrote {write_page()}")
        return 0
    try:
        answers = [
            a for c in CHAPTERS for a in read_answers(c.number) if not options.chapter or c.number in options.chapter
        ]
        _ = [a.source() for a in answers]
    except BadMutant as error:
        print(f"cannot run: {error}")
        return 2
    answers = [a for a in answers if any(text in a.label for text in options.only)]
    answers = [a for a in answers if not any(text in a.label for text in options.without)]
    answers = [a for a in answers if options.where is None or (a.is_mutant and a.where in options.where)]
    answers = [a for a in answers if not (options.variants and a.is_mutant)]
    if not answers:
        print("cannot run: no mutant or variant fits")
        return 2
    if options.timed and options.jobs > 1:
        parser.error("--timed runs one process alone on the GPU; allowed: --jobs 1")
    timed = options.timed or (False if options.jobs > 1 and torch.cuda.is_available() else None)
    began = time.monotonic()
    runs: dict[str, list[list[Trial]]] = {key(a): [] for a in answers}
    entries: dict[str, dict[str, Any]] = {}
    measured: dict[str, Any] = {"device": device_name(), "answers": []}
    for number in range(options.repeat):
        for answer, trials in run_matrix(answers, not options.quick, options.jobs, timed):
            runs[key(answer)].append(trials)
            entries[key(answer)] = entry(answer, runs[key(answer)], not options.quick and timed is None)
            if number == 0:
                _show(answer, entries[key(answer)], trials, options.messages)
            measured["answers"] = list(entries.values())
            if options.json:  # now, so that a run which is cut off leaves what it found
                options.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    bad = [e for e in entries.values() if e["problem"] or not e["same_in_every_run"]]
    mutants = sum(a.is_mutant for a in answers)
    elsewhere = sum(a.where != ANYWHERE for a in answers)
    print(
        f"{mutants} mutants ({elsewhere} need a GPU), {len(answers) - mutants} correct variants, on {device_name()}: "
        f"{len(bad)} judged wrongly or not always alike, {options.repeat} runs, {time.monotonic() - began:.0f} s"
    )
    if options.write:
        print(f"wrote {merge(measured)}")
        print(f"wrote {write_page()}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

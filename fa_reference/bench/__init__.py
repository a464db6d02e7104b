"""The benchmark: course versions against library kernels, interleaved in one run, errors beside every time.

`python -m fa_reference bench` is the entry; `cli.py` reads the options, `run.py` does the work on a GPU and
`cpu.py` says what can be said without one.
"""

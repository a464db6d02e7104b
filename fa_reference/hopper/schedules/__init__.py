"""Attention schedules for the model, each a step from the one before it.

A schedule is a module with CONSUMERS, the number of warpgroups with 64 queries each, and kernel(sm, block, ...), which
declares shared memory and barriers and returns the roles by name.
"""

from fa_reference.hopper.schedules import pingpong, serial, two_stage, warp_specialised

SCHEDULES = {
    "serial": serial,
    "warp-specialised": warp_specialised,
    "pingpong": pingpong,
    "two-stage": two_stage,
}

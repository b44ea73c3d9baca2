"""A death at every write: ends runs before, half-way through and after each system call that changes a file.

    shim.c         counts those calls in one folder over all processes of a run, kills at one of them, or records them
    shim.py        builds it, arms it, reads its records
    layouts.py     what is put to death: files, target, handles, class          <- a new layout is one entry of LAYOUTS
    processes.py   the classes of these layouts
    actions.py     what a driver does while it is armed, and wrong ways, as a proof that failures are seen
    check.py       what must hold after a death, and after the run was resumed
    snapshots.py   all that a file holds, to be compared
    stage.py       the face of
    server.py      one Python process with all imports done, which forks a driver for each trial
    trials.py      which points there are, in which phase; tries them
    tally.py       and counts
    power.py       replays a record as a power cut could have left it

A trial, by hand::

    from deaths import shim, stage, trials
    with stage.Stage(folder, shim.build(folder)) as running:
        scene = trials.Scene(running, "handle, contiguous, 3 siblings")
        for point in scene.points("creation"):
            print(point, scene.try_point(point).problems)

To add a layout, put a `Layout` into `layouts.LAYOUTS`: tests, the exhaustive mode and benchmarks/promise.py take it up.
Phases named in its `unsafe` are left out by all of them; take a phase away from there once it holds its promise.
`check.is_journal` tells journals from other sidecar files by their names: points between the sync that completes one
and its removal are those from which the phase "recovery" starts. `check.recover_file` recovers as `lazyproc recover`
does, whatever kinds of journals there are.
"""

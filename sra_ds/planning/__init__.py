"""What a run would need on a cluster, from closed forms: memory, bytes sent, step time, days and cost.

    recipe --shapes--> parameters by module and optimizer group
    recipe, layout, ZeRO configuration --memory, communication--> bytes per rank, bytes sent per step
    those, a GPU and a network --step_time--> seconds per step
    all of it for every configuration --plan--> what fits, what is fastest, how to start it
    the same over numbers of GPUs --study--> docs/scaling.md

Pure functions: nothing is run, read or written here. Memory and bytes are checked against CPU processes
(tests/planning); times follow from data sheets and are measured nowhere.
"""

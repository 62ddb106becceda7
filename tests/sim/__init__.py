"""The decisions of a resharding job against a simulated world: virtual time, one seed, every interleaving again.

`loop` is the clock, `catalog` and `shard` the servers, `process` the programs that run jobs and die, `flow` and `world`
what a job's runner sees, `clients` the application, `schedule` a whole run with its faults, `plants` faults put in on
purpose to show that the checks see them.

`facts` lists what all of this claims of real servers; `test_facts` plays each claim on both. `scripts` are its parts.
"""

------------------------------ MODULE Reshard ------------------------------
(***************************************************************************)
(* One range of keys moves from shard A to shard B while clients write,    *)
(* by runners that may stop at any step and be followed by another one.    *)
(*                                                                         *)
(* The page index.md says which function of the code each action is, and   *)
(* which promise each invariant. What a runner does in one step here is    *)
(* one transaction on one shard, or one look at the catalog, so "killed at *)
(* any step" is "takes no step any more": runners are not fair.            *)
(***************************************************************************)
EXTENDS Integers, Sequences, FiniteSets, TLC

CONSTANTS
    Clients,    \* who work through gates, by the topology they know
    Foreign,    \* who write to A without a gate, as psql does; {} or a few
    Runners,    \* processes that may hold the job, each once
    MaxWrites,  \* writes of all clients together
    MaxTries,   \* attempts that may give way, of all runners together
    MaxLost,    \* answers of the catalog that may be lost
    MaxOther,   \* topologies that others publish meanwhile
    Replica,    \* whether A has an asynchronous replica, which may be promoted once
    Wishes,     \* what the operator may ask for: subset of {"cancel", "rollback", "complete"}
    Faults      \* what is done wrong on purpose; {} is the code

VARIABLES
    cat,        \* the stored topology, as far as it is about the range
    net,        \* swaps of the topology that are on their way to the catalog
    lease,      \* token of the job's lease, held by the runner that has it; negative when given back
    job,        \* the stored record of the job
    st,         \* the databases
    primary,    \* the node of A that clients reach
    run,        \* the runners
    cl,         \* the clients
    fw,         \* the foreign writers: 0, or the write they have under way
    next,       \* number of the next write
    acked,      \* writes whose COMMIT was answered
    tries, lost, other

vars == <<cat, net, lease, job, st, primary, run, cl, fw, next, acked, tries, lost, other>>

Writes == 1..MaxWrites
Nodes == {"P", "R", "B"}          \* primary of A, replica of A, primary of B
NoPos == -1
Nothing == [w \in Writes |-> 0]   \* how often each write is in the rows
Held(rows) == {w \in Writes : rows[w] > 0}
Fault(name) == name \in Faults
Other(s) == IF s = "A" THEN "B" ELSE "A"

\* Where a client, and a runner by the connections that it has, finds a shard.
At(s) == IF s = "B" THEN "B" ELSE primary
NodeOf(r, s) == IF s = "B" THEN "B" ELSE run[r].node

Empty == [open |-> {}, rows |-> Nothing, log |-> <<>>, guard |-> FALSE, tok |-> 0,
          pos |-> NoPos, slot |-> FALSE, copied |-> FALSE, keys |-> FALSE]
Idle == [pc |-> "off", tok |-> 0, status |-> "none", v |-> <<>>, node |-> "P", pos |-> NoPos, bar |-> 0,
         snap |-> Nothing, dir |-> "f", what |-> "", for |-> "", ret |-> "", ok |-> FALSE, todo |-> {}]

First == [ver |-> 1, owner |-> "A", gate |-> 1, nextgate |-> 2, move |-> "none"]

Init ==
    /\ cat = First /\ net = {} /\ lease = 0
    /\ job = [status |-> "pending", outcome |-> "none"]
    /\ st = [n \in Nodes |-> IF n = "B" THEN Empty ELSE [Empty EXCEPT !.open = {1}]]
    /\ primary = "P"
    /\ run = [r \in Runners |-> Idle]
    /\ cl = [c \in Clients |-> [pc |-> "idle", shard |-> "A", gate |-> 1, id |-> 0]]
    /\ fw = [f \in Foreign |-> 0]
    /\ next = 1 /\ acked = {} /\ tries = 0 /\ lost = 0 /\ other = 0

(***************************************************************************)
(* Clients                                                                 *)
(***************************************************************************)

clientRest == <<cat, net, lease, job, primary, run, fw, tries, lost, other>>

\* The topology arrives, at some time or never.
Refresh(c) ==
    /\ cl[c].pc = "idle" /\ cl[c].id = 0
    /\ <<cl[c].shard, cl[c].gate>> # <<cat.owner, cat.gate>>
    /\ cl' = [cl EXCEPT ![c].shard = cat.owner, ![c].gate = cat.gate]
    /\ UNCHANGED <<st, next, acked>> /\ UNCHANGED clientRest

GateOpen(c) == cl[c].gate \in st[At(cl[c].shard)].open \/ Fault("client without a gate")

Begin(c) ==
    /\ cl[c].pc = "idle" /\ cl[c].id = 0 /\ next <= MaxWrites /\ GateOpen(c)
    /\ cl' = [cl EXCEPT ![c].pc = "in", ![c].id = next]
    /\ next' = next + 1
    /\ UNCHANGED <<st, acked>> /\ UNCHANGED clientRest

\* COMMIT is done and answered. One that is not answered leaves the same rows, and nobody who counts on them, so it is
\* left out where it is not repeated. The guard would refuse the row; see NobodyMeetsTheGuard.
Commit(c) ==
    LET n == At(cl[c].shard)  w == cl[c].id IN
    /\ cl[c].pc = "in" /\ ~st[n].guard
    /\ st' = [st EXCEPT ![n].rows[w] = @ + 1, ![n].log = Append(@, w)]
    /\ \/ acked' = acked \union {w} /\ cl' = [cl EXCEPT ![c].pc = "idle", ![c].id = 0]
       \/ Fault("retry of an unknown commit") /\ acked' = acked /\ cl' = [cl EXCEPT ![c].pc = "again"]
    /\ UNCHANGED next /\ UNCHANGED clientRest

Again(c) ==
    /\ cl[c].pc = "again" /\ GateOpen(c)
    /\ cl' = [cl EXCEPT ![c].pc = "in"]
    /\ UNCHANGED <<st, next, acked>> /\ UNCHANGED clientRest

\* Without a gate. The guard is met by the statement that writes; COMMIT comes later.
ForeignWrite(f) ==
    /\ fw[f] = 0 /\ next <= MaxWrites /\ ~st[primary].guard
    /\ job.status # "over" /\ job.outcome # "completed"
    /\ fw' = [fw EXCEPT ![f] = next] /\ next' = next + 1
    /\ UNCHANGED <<cat, net, lease, job, st, primary, run, cl, acked, tries, lost, other>>

ForeignCommit(f) ==
    /\ fw[f] # 0
    /\ st' = [st EXCEPT ![primary].rows[fw[f]] = @ + 1, ![primary].log = Append(@, fw[f])]
    /\ acked' = acked \union {fw[f]} /\ fw' = [fw EXCEPT ![f] = 0]
    /\ UNCHANGED <<cat, net, lease, job, primary, run, cl, next, tries, lost, other>>

(***************************************************************************)
(* The catalog and the replica                                             *)
(***************************************************************************)

\* What can never be swapped any more is not worth remembering.
Alive(requests, version, token) ==
    {q \in requests : (q.expected = version \/ Fault("swap without compare")) /\ q.tok = token}

\* A swap arrives: compared with the version that is stored, and with the lease.
Deliver(q) ==
    /\ q \in net /\ q.tok = lease
    /\ q.expected = cat.ver \/ Fault("swap without compare")
    /\ cat' = IF q.new.ver > cat.ver THEN q.new ELSE [q.new EXCEPT !.ver = cat.ver + 1]
    /\ net' = Alive(net \ {q}, cat'.ver, lease)
    /\ run' = [r \in Runners |->
                 IF run[r].tok = q.tok /\ run[r].pc = "wait" /\ run[r].v = q.from /\ run[r].what = q.what
                 THEN [run[r] EXCEPT !.ok = TRUE] ELSE run[r]]
    /\ UNCHANGED <<lease, job, st, primary, cl, fw, next, acked, tries, lost, other>>

OtherPublishes ==
    /\ other < MaxOther /\ other' = other + 1
    /\ cat' = [cat EXCEPT !.ver = @ + 1] /\ net' = Alive(net, cat.ver + 1, lease)
    /\ UNCHANGED <<lease, job, st, primary, run, cl, fw, next, acked, tries, lost>>

\* The replica is some earlier state of its primary; slots are not replicated.
Replay ==
    /\ Replica /\ primary = "P"
    /\ LET copy == [st["P"] EXCEPT !.slot = FALSE] IN
       /\ st["R"] # copy /\ st' = [st EXCEPT !["R"] = copy]
    /\ UNCHANGED <<cat, net, lease, job, primary, run, cl, fw, next, acked, tries, lost, other>>

\* Somebody promotes it. What it had not received is lost, as an asynchronous replica may. The old primary may still
\* answer runners that are connected to it.
Promote ==
    /\ Replica /\ primary = "P" /\ primary' = "R"
    /\ cl' = [c \in Clients |-> IF cl[c].pc # "idle" /\ cl[c].shard = "A"
                                THEN [cl[c] EXCEPT !.pc = "idle", !.id = 0] ELSE cl[c]]
    /\ acked' = IF cat.owner = "A" THEN acked \intersect Held(st["R"].rows) ELSE acked
    /\ UNCHANGED <<cat, net, lease, job, st, run, fw, next, tries, lost, other>>

(***************************************************************************)
(* Runners. Each step ends in `Goto` and leaves clients alone.             *)
(***************************************************************************)

runnerRest == <<primary, cl, fw, next, acked, other>>

Set(r, new) == run' = [run EXCEPT ![r] = new]
Goto(r, pc) == Set(r, [run[r] EXCEPT !.pc = pc])
Dead(r) == Set(r, [Idle EXCEPT !.pc = "dead"])

\* SELECT shardlib.claimed(job, token) at the head of a transaction on node n.
Claimed(r, n) == st[n].tok = run[r].tok \/ Fault("no fencing token")

\* A transaction of runner r on node n that makes `new` of it; the runner goes on as `then`, or is superseded.
Sql(r, n, new, then) ==
    /\ IF Claimed(r, n) THEN st' = [st EXCEPT ![n] = new] /\ Set(r, then)
                        ELSE UNCHANGED st /\ Dead(r)
    /\ UNCHANGED <<cat, net, lease, job, tries, lost>> /\ UNCHANGED runnerRest

Local(r, then) == Set(r, then) /\ UNCHANGED <<cat, net, lease, job, st, tries, lost>> /\ UNCHANGED runnerRest

\* Saving the record of the job, which needs the lease; an unknown outcome is saved again.
Save(r, status, outcome, then) ==
    /\ IF lease = run[r].tok
       THEN job' = [status |-> status, outcome |-> outcome] /\ Set(r, [then EXCEPT !.status = status])
       ELSE UNCHANGED job /\ Dead(r)
    /\ UNCHANGED <<cat, net, lease, st, tries, lost>> /\ UNCHANGED runnerRest

\* The lease is free when its holder has stopped, or is only slow. Its token only rises.
NextToken == 1 + IF lease < 0 THEN -lease ELSE lease
Acquire(r) ==
    /\ run[r].pc = "off" /\ job.status # "over"
    /\ lease' = NextToken /\ net' = Alive(net, cat.ver, NextToken)
    /\ Set(r, [Idle EXCEPT !.pc = "claim A", !.tok = NextToken, !.status = job.status, !.node = primary])
    /\ UNCHANGED <<cat, job, st, tries, lost>> /\ UNCHANGED runnerRest

Claim(r) ==
    \E s \in {"A", "B"} :
    LET n == NodeOf(r, s) IN
    /\ run[r].pc = "claim " \o s
    /\ IF st[n].tok <= run[r].tok \/ Fault("no fencing token")
       THEN st' = [st EXCEPT ![n].tok = run[r].tok] /\ Goto(r, IF s = "A" THEN "claim B" ELSE "look")
       ELSE UNCHANGED st /\ Dead(r)
    /\ UNCHANGED <<cat, net, lease, job, tries, lost>> /\ UNCHANGED runnerRest

\* After a fault: anew, with new connections.
Afresh(r) == [run[r] EXCEPT !.pc = "claim A", !.node = primary, !.ok = FALSE, !.v = <<>>, !.what = "", !.for = "", !.ret = "",
                            !.todo = {},
                            !.snap = Nothing, !.bar = 0, !.pos = NoPos, !.dir = "f"]

Call(r, pc, ret) == [run[r] EXCEPT !.pc = pc, !.ret = ret, !.v = <<>>]
Anew(r) == Call(r, "sweep", "try")   \* gates of older topologies, then an attempt
Serving(outcome) == IF outcome = "completed" THEN "B" ELSE "A"

Look(r) ==
    /\ run[r].pc = "look"
    /\ CASE run[r].status = "cleanup" ->
              IF cat.move = "none"
              THEN Local(r, Call(r, "sweep", "not announced"))
              ELSE Local(r, Call(r, "reopen", "purge"))
         [] run[r].status \notin {"over", "cleanup"} /\ cat.move = "switched" ->
              IF run[r].status \in {"cutover", "validation"}
              THEN Save(r, "validation", "none", Call(r, "guard source", ""))
              ELSE Dead(r) /\ UNCHANGED <<cat, net, lease, job, st, tries, lost>> /\ UNCHANGED runnerRest
         [] run[r].status = "validation" /\ cat.move # "switched" ->
              Save(r, "cleanup", "rolled_back", run[r])
         [] run[r].status \in {"pending", "moving", "cutover"} /\ cat.move # "switched" ->
              \/ "cancel" \in Wishes /\ IF cat.move = "none" THEN Save(r, "cleanup", "cancelled", run[r])
                                        ELSE Local(r, Call(r, "reopen", "cancel"))
              \/ Local(r, IF run[r].status = "pending" /\ cat.move = "none" THEN Call(r, "prepare", "announced")
                          ELSE IF run[r].status = "pending" THEN Call(r, "sweep", "announced")
                          ELSE Call(r, "reopen", "opened"))

(* Publishing: look, take the number of the gate by a swap of its own, open the gate, send the swap. *)

Opens(what) == what \in {"announce", "renew", "finish", "switch"}

\* The topology after v. What opens a gate takes the number that v, a topology with one number more taken, is about.
NewTopology(v, what) ==
    [ver |-> v.ver + 1,
     owner |-> IF what = "switch" THEN Other(v.owner) ELSE v.owner,
     gate |-> IF Opens(what) THEN v.nextgate - 1 ELSE v.gate,
     nextgate |-> IF what = "reserve" THEN v.nextgate + 1 ELSE v.nextgate,
     move |-> CASE what = "announce" -> "copying" [] what = "finish" -> "none"
                [] what = "switch" -> (IF v.move = "copying" THEN "switched" ELSE "copying")
                [] OTHER -> v.move]

\* A gate is opened before the swap is sent that names it. A rollback does it the other way round: clients wait for the
\* gate until the guard of the old side is down, which stands until the swap is certain.
Send(r, v, what, then) ==
    LET new == NewTopology(v, what)
        n == NodeOf(r, new.owner)
        back == what = "switch" /\ new.owner = "A"
        early == Fault("guard lowered before the swap")
        opened == IF Opens(what) /\ (early \/ ~back) THEN [st[n] EXCEPT !.open = @ \union {new.gate}] ELSE st[n]
        lowered == IF back /\ early THEN [opened EXCEPT !.guard = FALSE] ELSE opened
    IN
    /\ IF Claimed(r, n) \/ ~Opens(what)
       THEN /\ st' = [st EXCEPT ![n] = lowered]
            /\ net' = Alive(net \union {[tok |-> run[r].tok, expected |-> v.ver, new |-> new, from |-> v,
                                         what |-> what]}, cat.ver, lease)
            /\ Set(r, [then EXCEPT !.pc = "wait", !.v = v, !.what = what, !.ok = FALSE])
       ELSE UNCHANGED <<st, net>> /\ Dead(r)
    /\ UNCHANGED <<cat, lease, job, tries, lost>> /\ UNCHANGED runnerRest

\* `v` of the runner is what it saw when it began: the moves must still be as they were then.
Moved(r) == run[r].v # <<>> /\ (cat.owner # run[r].v.owner \/ cat.move # run[r].v.move)

Publish(r) ==
    \/ \E what \in {"announce", "bump", "renew", "finish"} :
       /\ run[r].pc = "publish " \o what
       /\ IF Moved(r) \/ (what = "announce" /\ cat.move # "none") \/ (what = "finish" /\ cat.move = "none")
          THEN Local(r, Afresh(r))
          ELSE Send(r, cat, IF Opens(what) THEN "reserve" ELSE what, [run[r] EXCEPT !.for = what])
    \/ run[r].pc = "reserved" /\ Send(r, run[r].v, run[r].for, run[r])

Waiting(r) == {q \in net : q.tok = run[r].tok /\ q.from = run[r].v /\ q.what = run[r].what}
Unnamed(opened, v) == {sg \in opened : sg[2] < v.nextgate /\ ~(v.owner = sg[1] /\ v.gate = sg[2])}

\* The answer came. A gate opened for a topology that never was is closed by the next sweep.
Answered(r) ==
    LET what == run[r].what  ret == run[r].ret  after == NewTopology(run[r].v, what)
        heard == [run[r] EXCEPT !.ok = FALSE, !.what = "", !.v = <<>>]
    IN
    /\ run[r].pc = "wait"
    /\ \/ /\ run[r].ok
          /\ Local(r,
               CASE what = "reserve" -> [heard EXCEPT !.v = after,
                                                      !.pc = IF run[r].for = "switch" THEN "close" ELSE "reserved"]
                 [] what = "settle" -> [heard EXCEPT !.pc = "swept", !.todo = Unnamed(@, after)]
                 [] what = "bump" -> [heard EXCEPT !.v = run[r].v, !.pc = "lower"]
                 [] what = "renew" -> [heard EXCEPT !.pc = ret, !.for = ""]
                 [] what = "announce" -> [heard EXCEPT !.pc = "sweep", !.ret = "announced", !.for = ""]
                 [] what = "finish" -> [heard EXCEPT !.pc = "sweep", !.ret = "not announced", !.for = ""]
                 [] what = "switch" -> [heard EXCEPT !.v = after, !.pc = IF run[r].dir = "f" THEN "switched" ELSE "lower source"])
       \/ /\ ~run[r].ok /\ Waiting(r) = {}
          /\ Local(r,
               IF lease # run[r].tok THEN [Idle EXCEPT !.pc = "dead"]
               ELSE IF what = "switch" THEN [heard EXCEPT !.pc = "take back", !.for = ""]
               ELSE IF what = "settle" THEN [heard EXCEPT !.pc = "sweep", !.todo = {}]
               ELSE IF run[r].for = "switch" THEN Anew(r)
               ELSE [heard EXCEPT !.pc = "publish " \o run[r].for, !.v = run[r].v])

\* No answer, and reading back did not settle it: look again. The swap may be on its way for ever.
NoAnswer(r) ==
    /\ run[r].pc = "wait" /\ lost < MaxLost /\ lost' = lost + 1
    /\ Set(r, Afresh(r))
    /\ UNCHANGED <<cat, net, lease, job, st, tries>> /\ UNCHANGED runnerRest

(* Gates of topologies that are over. *)

Holding(n, g) == {c \in Clients : cl[c].pc = "in" /\ At(cl[c].shard) = n /\ cl[c].gate = g}
Drop(n, g) == [st[n] EXCEPT !.open = @ \ {g}]
Stale(n, s, v) == {g \in st[n].open : g < v.nextgate /\ ~(v.owner = s /\ v.gate = g)}

\* The gates are listed first, then the topology is read. One above all that are named may be another's, who is about
\* to publish it: a new version ends that.
Sweep(r) ==
    LET opened == {<<s, g>> \in {"A", "B"} \X (1..cat.nextgate) : g \in st[NodeOf(r, s)].open} IN
    \/ /\ run[r].pc = "sweep"
       /\ IF Fault("stale gates left open") THEN Local(r, [run[r] EXCEPT !.pc = run[r].ret, !.ret = ""])
          ELSE IF \E sg \in opened : cat.gate < sg[2] /\ sg[2] < cat.nextgate
          THEN Send(r, cat, "settle", [run[r] EXCEPT !.todo = opened])
          ELSE Local(r, [run[r] EXCEPT !.pc = "swept", !.todo = Unnamed(opened, cat)])
    \/ /\ run[r].pc = "swept"
       /\ IF run[r].todo = {} THEN Local(r, [run[r] EXCEPT !.pc = run[r].ret, !.ret = ""])
          ELSE \E sg \in run[r].todo :
               LET n == NodeOf(r, sg[1])  g == sg[2] IN
               Holding(n, g) = {} /\ Sql(r, n, Drop(n, g), [run[r] EXCEPT !.todo = @ \ {sg}])

(* reopen(): the ranges are open where they are served. *)

ServingNow(r) ==
    IF run[r].status = "cleanup" THEN Serving(job.outcome)
    ELSE IF run[r].status = "validation" THEN "B" ELSE "A"

Reopen(r) ==
    LET s == ServingNow(r)  n == NodeOf(r, s)  certain == run[r].pc = "take back" IN
    /\ run[r].pc \in {"reopen", "take back"}
    /\ IF cat.owner # s THEN Local(r, Afresh(r))
       ELSE IF cat.gate \in st[n].open \/ certain \/ Fault("reopened without a new version")
       THEN Local(r, [run[r] EXCEPT !.v = cat, !.pc = "lower",
                              !.ret = IF ~certain THEN @ ELSE "retry"])
       ELSE Local(r, [run[r] EXCEPT !.v = cat, !.pc = "publish bump"])

Lower(r) ==
    LET s == ServingNow(r)  n == NodeOf(r, s) IN
    /\ run[r].pc = "lower"
    /\ IF run[r].v.gate \in st[n].open
       THEN Sql(r, n, [st[n] EXCEPT !.guard = FALSE], [run[r] EXCEPT !.pc = run[r].ret, !.v = <<>>])
       ELSE IF Fault("reopened without a new version")
       THEN Sql(r, n, [st[n] EXCEPT !.guard = FALSE, !.open = @ \union {run[r].v.gate}],
                [run[r] EXCEPT !.pc = run[r].ret, !.v = <<>>])
       ELSE Sql(r, n, [st[n] EXCEPT !.guard = FALSE], [run[r] EXCEPT !.pc = "publish renew"])

(* Copy and stream. *)

Steps(r) ==
    \/ run[r].pc = "announced" /\ Save(r, "moving", "none", Call(r, "sweep", "copied?"))
    \/ /\ run[r].pc = "prepare"      \* the key table; that of A comes and goes with it
       /\ Sql(r, "B", [st["B"] EXCEPT !.keys = TRUE], [run[r] EXCEPT !.pc = "publish announce"])
    \/ run[r].pc = "opened" /\ Local(r, Call(r, "sweep", "copied?"))
    \/ run[r].pc = "retry" /\ Local(r, Anew(r))
    \/ run[r].pc = "cancel" /\ Save(r, "cleanup", "cancelled", Afresh(r))
    \/ run[r].pc = "switched" /\ Save(r, "validation", "none", Afresh(r))
    \/ LET a == NodeOf(r, "A") IN
       \/ /\ run[r].pc = "lower source"
          /\ Sql(r, a, [st[a] EXCEPT !.guard = FALSE], [run[r] EXCEPT !.pc = "open source"])
       \/ /\ run[r].pc = "open source"
          /\ Sql(r, a, [st[a] EXCEPT !.open = @ \union {run[r].v.gate}], [run[r] EXCEPT !.pc = "rolled back"])
    \/ run[r].pc = "rolled back" /\ Save(r, "cleanup", "rolled_back", Afresh(r))

Copied(r) ==
    LET a == NodeOf(r, "A") IN
    /\ run[r].pc = "copied?"
    /\ IF ~st["B"].keys THEN Local(r, [Idle EXCEPT !.pc = "dead"])      \* fails: the job is over
       ELSE IF st["B"].copied /\ st[a].slot
       THEN Local(r, [Anew(r) EXCEPT !.pos = st["B"].pos])   \* the stream starts where B says
       ELSE Sql(r, "B", [st["B"] EXCEPT !.copied = FALSE, !.rows = Nothing, !.pos = NoPos], [run[r] EXCEPT !.pc = "slot"])

\* The slot, and the snapshot that belongs to its place in the log. The token was looked at before; to make a slot and
\* to look are two things.
Slot(r) ==
    LET a == NodeOf(r, "A") IN
    /\ run[r].pc = "slot"
    /\ st' = [st EXCEPT ![a].slot = TRUE]
    /\ Set(r, [run[r] EXCEPT !.pc = "copy", !.snap = st[a].rows, !.pos = Len(st[a].log)])
    /\ UNCHANGED <<cat, net, lease, job, tries, lost>> /\ UNCHANGED runnerRest

Copy(r) ==
    /\ run[r].pc = "copy"
    /\ IF ~st["B"].keys THEN Local(r, [Idle EXCEPT !.pc = "dead"])
       ELSE Sql(r, "B", [st["B"] EXCEPT !.rows = run[r].snap, !.pos = run[r].pos, !.copied = TRUE],
                [Anew(r) EXCEPT !.snap = Nothing])

Streaming == {"retry", "sweep", "try", "close", "guard", "barrier", "heard", "hand over", "switch", "wait", "take back",
              "lower", "publish renew", "reserved", "swept", "reserve", "validate"}
Flows(r) == run[r].pc \in Streaming /\ run[r].pos # NoPos

\* One transaction of the origin is applied, with the position, in one transaction of the sink.
Apply(r) ==
    LET back == run[r].dir = "r"
        from == NodeOf(r, IF back THEN "B" ELSE "A")
        to == NodeOf(r, IF back THEN "A" ELSE "B")
        w == st[from].log[run[r].pos + 1]
        rows == [st[to] EXCEPT !.rows[w] = @ + 1, !.log = Append(@, w)]
        both == [rows EXCEPT !.pos = run[r].pos + 1]
    IN
    /\ Flows(r) /\ run[r].pos < Len(st[from].log) /\ (back \/ st[from].slot) /\ st[to].rows[w] < 2
    /\ IF Fault("position apart from the rows")
       THEN \/ Sql(r, to, rows, Afresh(r))      \* killed between the two
            \/ Sql(r, to, both, [run[r] EXCEPT !.pos = @ + 1])
       ELSE Sql(r, to, both, [run[r] EXCEPT !.pos = @ + 1])

(* One attempt of a cutover, forward or back. *)

Origin(r) == IF run[r].dir = "f" THEN "A" ELSE "B"

Attempt(r) ==
    LET s == Origin(r)  n == NodeOf(r, s)  v == run[r].v IN
    \/ /\ run[r].pc = "try"
       /\ IF cat.owner # s \/ cat.move = "none" THEN Local(r, Afresh(r))
          ELSE Save(r, IF s = "A" THEN "cutover" ELSE "validation", "none", [run[r] EXCEPT !.pc = "reserve",
                    !.bar = IF Fault("barrier before the gate is closed") THEN Len(st[n].log) ELSE 0])
    \/ /\ run[r].pc = "reserve"         \* the number of the new side's gate, before anything is closed
       /\ IF cat.owner # s \/ cat.move = "none" THEN Local(r, Afresh(r))
          ELSE Send(r, cat, "reserve", [run[r] EXCEPT !.for = "switch"])
    \/ /\ run[r].pc = "close" /\ Holding(n, v.gate) = {}
       /\ Sql(r, n, Drop(n, v.gate),
              [run[r] EXCEPT !.pc = IF Stale(n, s, v) # {} /\ ~Fault("stale gates left open") THEN "take back"
                                    ELSE "guard"])
    \/ /\ run[r].pc = "guard"
       /\ Sql(r, n, [st[n] EXCEPT !.guard = TRUE], [run[r] EXCEPT !.pc = "barrier"])
    \/ /\ run[r].pc = "barrier"
       /\ n = "B" \/ Fault("no wait for foreign writers") \/ \A f \in Foreign : fw[f] = 0
       /\ Sql(r, n, st[n], [run[r] EXCEPT !.pc = "heard",
              !.bar = IF Fault("barrier before the gate is closed") THEN @ ELSE Len(st[n].log)])
    \/ /\ run[r].pc = "heard"
       /\ run[r].pos >= run[r].bar \/ Fault("no drain")
       /\ \/ n = "B" \/ ~Replica \/ Fault("closing not replayed by the replica")
          \/ v.gate \notin st["R"].open /\ Stale("R", s, v) = {}
          \/ Fault("a promoted replica counts as replayed") /\ primary = "R"
       /\ Local(r, [run[r] EXCEPT !.pc = IF s = "A" THEN "hand over" ELSE "switch", !.bar = 0])
    \/ /\ run[r].pc = "hand over"       \* where the way back starts
       /\ Sql(r, n, [st[n] EXCEPT !.pos = Len(st["B"].log)], [run[r] EXCEPT !.pc = "switch"])
    \/ /\ run[r].pc = "switch" /\ Send(r, v, "switch", run[r])

\* The budget ends, or somebody is in the way.
GiveWay(r) ==
    /\ run[r].pc \in {"close", "guard", "barrier", "heard", "hand over"} /\ tries < MaxTries
    /\ tries' = tries + 1
    /\ Set(r, [run[r] EXCEPT !.pc = "take back", !.bar = 0, !.for = ""])
    /\ UNCHANGED <<cat, net, lease, job, st, lost>> /\ UNCHANGED runnerRest

(* After the switch. *)

Validate(r) ==
    LET a == NodeOf(r, "A") IN
    \/ /\ run[r].pc = "guard source"
       /\ Sql(r, a, [st[a] EXCEPT !.guard = TRUE],
              Call(r, "reopen", "stop forward"))
    \/ /\ run[r].pc = "stop forward"
       /\ st' = [st EXCEPT ![a].slot = FALSE]
       /\ Set(r, [run[r] EXCEPT !.pc = "validate", !.pos = st[a].pos, !.dir = "r", !.ret = ""])
       /\ UNCHANGED <<cat, net, lease, job, tries, lost>> /\ UNCHANGED runnerRest
    \/ /\ run[r].pc = "validate"
       /\ \/ "complete" \in Wishes /\ Save(r, "cleanup", "completed", Afresh(r))
          \/ "rollback" \in Wishes /\ run[r].pos # NoPos /\ Local(r, Anew(r))

(* Cleanup, whichever way the job went. *)

Cleanup(r) ==
    LET old == Other(Serving(job.outcome))  n == NodeOf(r, old)  a == NodeOf(r, "A") IN
    \/ /\ run[r].pc = "not announced"   \* nor will be: the sweep has ended a swap that opened a gate
       /\ Local(r, IF cat.move = "none" \/ Fault("undone while announced") THEN Call(r, "retire A", "")
                   ELSE Afresh(r))
    \/ /\ run[r].pc = "purge"
       /\ Sql(r, n, [st[n] EXCEPT !.rows = Nothing], [run[r] EXCEPT !.pc = "publish finish", !.ret = "", !.v = <<>>])
    \/ \E s \in {"A", "B"} : LET m == NodeOf(r, s) IN
       /\ run[r].pc = "retire " \o s
       /\ Sql(r, m, [st[m] EXCEPT !.guard = FALSE, !.tok = 0, !.pos = NoPos, !.copied = FALSE, !.keys = FALSE,
                            !.slot = FALSE],
              [run[r] EXCEPT !.pc = IF s = "A" THEN "retire B" ELSE "over"])
    \/ /\ run[r].pc = "over" /\ Save(r, "over", job.outcome, [run[r] EXCEPT !.pc = "release"])
    \/ /\ run[r].pc = "release"
       /\ lease' = IF lease = run[r].tok THEN -lease ELSE lease
       /\ net' = Alive(net, cat.ver, lease') /\ Set(r, [Idle EXCEPT !.pc = "end"])
       /\ UNCHANGED <<cat, job, st, tries, lost>> /\ UNCHANGED runnerRest

\* A connection to a node that is no primary any more may break at any time.
Broken(r) ==
    /\ run[r].node # primary /\ run[r].pc \notin {"off", "dead", "release", "end"}
    /\ Local(r, Afresh(r))

\* A closed gate of B that no topology names, and whose transaction ended badly, leaves the runner at a step that
\* refuses it: it stands still as "dead".
Step(r) == Acquire(r) \/ Claim(r) \/ Look(r) \/ Publish(r) \/ Answered(r) \/ Sweep(r) \/ Reopen(r) \/ Lower(r)
           \/ Steps(r) \/ Copied(r) \/ Slot(r) \/ Copy(r) \/ Attempt(r) \/ Validate(r) \/ Cleanup(r) \/ Broken(r)

Next ==
    \/ \E r \in Runners : Step(r) \/ Apply(r) \/ GiveWay(r) \/ NoAnswer(r)
    \/ \E c \in Clients : Refresh(c) \/ Begin(c) \/ Commit(c) \/ Again(c)
    \/ \E f \in Foreign : ForeignWrite(f) \/ ForeignCommit(f)
    \/ \E q \in net : Deliver(q)
    \/ OtherPublishes \/ Replay \/ Promote

Spec == Init /\ [][Next]_vars

(***************************************************************************)
(* What must hold                                                          *)
(***************************************************************************)

\* P1, P2: who is in a transaction of the range is at its owner.
OneOwner == \A c \in Clients : cl[c].pc = "in" => cl[c].shard = cat.owner

\* P3: what was acknowledged is where the topology says that the range is.
NothingLost == acked \subseteq Held(st[At(cat.owner)].rows)

\* P2: whoever is in a transaction, or could begin one now, reads all that was acknowledged.
NoStaleRead ==
    \A c \in Clients : (cl[c].pc = "in" \/ (cl[c].pc = "idle" /\ GateOpen(c)))
                       => acked \subseteq Held(st[At(cl[c].shard)].rows)

\* P3: nothing is applied twice, on either side.
NothingTwice == \A n \in {primary, "B"} : \A w \in Writes : st[n].rows[w] <= 1

\* P2: whoever came through a gate is not refused by the guard.
NobodyMeetsTheGuard == \A c \in Clients : cl[c].pc = "in" => ~st[At(cl[c].shard)].guard

\* A job that is over left nothing behind; undone, nothing has changed.
CleanEnd ==
    job.status = "over" =>
        /\ cat.owner = Serving(job.outcome) /\ cat.move = "none"
        /\ cat.gate \in st[At(cat.owner)].open
        /\ st[At(Other(cat.owner))].rows = Nothing
        /\ \A n \in {primary, "B"} : ~st[n].guard

\* Not while a runner that was superseded may still wake up and make one.
NoSlotLeft == job.status = "over" => \A n \in {primary, "B"} : ~st[n].slot

\* P4: whatever became of the first runners, the last one ends the job.
Over == job.status = "over"
Last == CHOOSE r \in Runners : TRUE
Fair ==
    /\ \A r \in Runners : WF_vars(run[r].pc # "off" /\ run[r].tok = Cardinality(Runners) /\ (Step(r) \/ Apply(r)))
    /\ \A r \in Runners : WF_vars(Acquire(r))
    /\ \A c \in Clients : WF_vars(Commit(c))
    /\ WF_vars(\E q \in net : Deliver(q))
FairSpec == Spec /\ Fair
Ends == <>Over

Symmetry == Permutations(Clients) \union Permutations(Runners)
=============================================================================

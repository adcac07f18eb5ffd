"""The processors that run on Kafka, and what they share.

Read `processor` and `loop` first: what a processor is, and the one loop that drives them all.

- The processors: `scorer`, `items`, `catalog`, `texts`, `answers`, `archiver` (with `compaction`),
  `insights` (a `faust_app`; by `steps`, with `sketches`, to `windows` and `alerts`), and the page:
  `dashboard_data` to `dashboard_view` to `dashboard_charts` and `dashboard_html`, served by
  `dashboard`. `run` starts them.
- A batch on its way: `fetching` has it brought, `pace` bounds it, `precedence` says what waits for
  another topic, `inputs` decodes it, `arrivals` puts it in order, `reader` and `user_states` have
  what is known of it (`asking`: of what no event brought), `models` predict it, `scorer_records`,
  `predictions` and `digests` tell of it, `sender` sends it in one transaction, and then `store`
  gets the new states, under keys by `partitions`.
- A partition that changes hands: `ownership` (of what Kafka assigned, what is worked on and how far
  it has been read), `starts`, `claims`, `journal`; of items' vectors, `coverage`; a worker that
  gets none any more: `membership`.
- Work of commands: `admin`, `producer`, `tail`, `redrive`, `forget` and `erasure`, `recount` and
  `rebuild`, `verify` (of what is `archived`; `verification` tells); `embedded` and `launch` start
  servers of our own.
- Around all: `config`, `clients`, `dead_letters`, `metrics`, `health`, `memory`, `deadline`,
  `exceptions`.
"""

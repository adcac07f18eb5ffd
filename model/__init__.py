"""What a rating is predicted from, and how.

Read `replay` first: the one way from events to states, features and predictions.

- Rows: `ids`, `events`, `catalog`, `texts`; what a batch reads, `lookups`.
- States: `state`, kept as `state_bytes`, sent as `updates`; `newcomers` of a partition.
- A prediction: `features`, `taste`, `network` (with `trees`, `calibration`, `distribution`), all in
  `predict`; `ladder` without a model; `explain` says why.
- The network on a CPU: `serving`, `serving_loops`.
- Texts to vectors: `encoder`, in batches by `engine`. Fewer weights: `adapters`, `heads`, `int8`
  with `int8_product`. Without padding: `packed` (by `attention`, `between`, `products`) on a CPU,
  `recorded` (by `gpu_kernels`) on a GPU.
- At rest and in service: `bundle`, `card`, `registry`, `canary`, in `storage`.
- Around all: `device`, `compiled`, `lanes`, `exceptions`.
"""

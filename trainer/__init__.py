"""Fitting, evaluation and the gate that a new model must pass.

Read `train` first: one training from beginning to end; `retrain` does it again and again.

- Rows: `data` (or `archived`), `clean` (by `copies`), `split`, all in `prepare`.
- The rating network: `fit`, of `ridge`, `factors`, `boost`; then `calibrate`.
- The text model: `text`, of `fine_tune` (by `methods`, `layers`, `augment`, `adapt`, `batches`);
  smaller ones by `compress`.
- How good it is: `assess`, of `models`, `baselines`, `metrics`; `gate`; `report`. `drift` says
  whether it still is.
- Beside others: `evaluate` and `evaluate_texts`, of `peers`, `leaks`, `ablations`, to `figures`;
  `search` looks for better settings.
- Around all: `config`, `checkpoints`, `kept`, `rates`, `progress`, `tracking`, `exceptions`.
"""

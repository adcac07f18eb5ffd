"""The contract, on the wire and at rest.

- What is said: `records` and `topics`, with `examples`; for others by `export`.
- On the wire: `codec`, on hot paths `columns`; the `journal`.
- At rest: record `files`; the tables of the `archive`, and a shop's `history` from them.
- Around all: `exceptions`, `urls`, `spans`.
"""

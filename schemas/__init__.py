"""The contract, on the wire and at rest: records, topics, encoding, archive tables, exports."""

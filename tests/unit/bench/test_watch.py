from bench.watch import Transaction, packed


def test_records_come_back_as_they_were_packed() -> None:
    first = [{"key": b"ada", "value": b"", "partition": 2}, {"key": b"", "value": b"five"}]
    later = [{"key": b"bo", "value": b"one", "partition": 0}]
    wrote = Transaction(3, {"journal": [packed(first), packed(later)], "alerts": [packed([])]})
    assert wrote.records("journal") == [first[0], first[1] | {"partition": -1}, later[0]]
    assert wrote.records("alerts") == wrote.records("reviews") == []
    assert wrote.bytes_out == 3 + 4 + 5

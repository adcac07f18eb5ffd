"""What the encoder's benchmark counts, on cases worked out by hand."""

from bench.text import buckets
from bench.ways import Shape


def test_operations_of_real_tokens() -> None:
    # A token costs 2 · (4 · 2² + 2 · 2 · 4) = 64 in linear layers; n tokens attend for 4 · n² · 2.
    assert Shape(hidden=2, inner=4, layers=1).operations([3]) == 3 * 64 + 4 * 9 * 2
    assert Shape(hidden=2, inner=4, layers=5).operations([1, 2]) == 5 * (3 * 64 + 8 + 32)
    assert Shape(hidden=384, inner=1536, layers=6).operations([1]) == 21_233_664 + 9_216


def test_buckets_by_length() -> None:
    assert buckets([3, 17, 16, 256, 300]) == {
        "1 to 16": [0, 2],
        "17 to 32": [1],
        "129 to 256": [3],
    }

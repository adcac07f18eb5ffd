package starcast.peer;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;

/**
 * Rows by hash, never changed: a file of rows with their hash before each. The last row is what a
 * hash gets that is not in it.
 */
final class Table {
    final int size; // rows, the last one not counted
    private final byte[] data;
    private final int stride;
    private final int[] slots; // an open table: 1 + the row whose hash is looked for from there on
    private final int mask;

    Table(Path file, int rowSize) throws IOException {
        data = Files.readAllBytes(file);
        stride = 8 + rowSize;
        if (data.length % stride != 0 || data.length == 0) {
            throw new IOException(file + " has no whole rows of " + rowSize + " bytes");
        }
        size = data.length / stride - 1;
        mask = Math.max(2, Integer.highestOneBit(size + 1) << 2) - 1;
        slots = new int[mask + 1];
        for (int row = 0; row < size; row++) {
            int slot = slot(hash(row));
            while (slots[slot] != 0) {
                slot = (slot + 1) & mask;
            }
            slots[slot] = row + 1;
        }
    }

    /** The number of a hash's row; {@code size} when it is missing. */
    int find(long hash) {
        for (int slot = slot(hash); slots[slot] != 0; slot = (slot + 1) & mask) {
            if (hash(slots[slot] - 1) == hash) {
                return slots[slot] - 1;
            }
        }
        return size;
    }

    Row row(int number) {
        return new Row(data, number * stride + 8);
    }

    /** A copy of a hash's row, to change. */
    Row copy(long hash) {
        int begin = find(hash) * stride + 8;
        return Row.of(data, begin, begin + stride - 8, stride - 8);
    }

    private long hash(int row) {
        return new Row(data, row * stride).i8(0);
    }

    private int slot(long hash) {
        return (int) (hash ^ hash >>> 32) & mask;
    }
}

package starcast.peer;

import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.nio.ByteOrder;
import java.util.Arrays;

/**
 * A row of one of the layouts of model/state.py, little endian and packed, as NumPy has it: the
 * same bytes in the state store here and in Valkey there, so that neither has to be translated.
 */
final class Row {
    static final int USER = 832;
    static final int PARTITION = 112;

    private static final VarHandle LONG = view(long[].class);
    private static final VarHandle INT = view(int[].class);
    private static final VarHandle DOUBLE = view(double[].class);
    private static final VarHandle FLOAT = view(float[].class);

    final byte[] data;
    final int base;

    Row(byte[] data, int base) {
        this.data = data;
        this.base = base;
    }

    /** A copy to change, of stored bytes from {@code begin} to {@code end}, zeros after them. */
    static Row of(byte[] stored, int begin, int end, int size) {
        byte[] whole = new byte[size];
        System.arraycopy(stored, begin, whole, 0, end - begin);
        return new Row(whole, 0);
    }

    /** The bytes to store: zeros at the end are cut off, so a short history has a short row. */
    byte[] stored() {
        int end = data.length;
        while (end > 0 && data[end - 1] == 0) {
            end--;
        }
        return Arrays.copyOf(data, end);
    }

    long i8(int at) {
        return (long) LONG.get(data, base + at);
    }

    long u4(int at) {
        return (int) INT.get(data, base + at) & 0xFFFF_FFFFL;
    }

    int u1(int at) {
        return data[base + at] & 0xFF;
    }

    double f8(int at) {
        return (double) DOUBLE.get(data, base + at);
    }

    float f4(int at) {
        return (float) FLOAT.get(data, base + at);
    }

    void i8(int at, long value) {
        LONG.set(data, base + at, value);
    }

    void u4(int at, long value) {
        INT.set(data, base + at, (int) value);
    }

    void u1(int at, int value) {
        data[base + at] = (byte) value;
    }

    void f8(int at, double value) {
        DOUBLE.set(data, base + at, value);
    }

    void add8(int at, double value) {
        f8(at, f8(at) + value);
    }

    void count4(int at, int more) {
        u4(at, u4(at) + more);
    }

    void count8(int at, int more) {
        i8(at, i8(at) + more);
    }

    private static VarHandle view(Class<?> kind) {
        return MethodHandles.byteArrayViewVarHandle(kind, ByteOrder.LITTLE_ENDIAN);
    }
}

"""Protobuf's wire format by hand, for messages that no library writes."""
import struct


def varint(value, most_bytes=10):
    """Of 64 bits, two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 128 and len(out) < most_bytes - 1:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number, wire_type):
    return varint(number << 3 | wire_type)


def uint(number, value):
    return tag(number, 0) + varint(value)


def fixed64(number, value):
    return tag(number, 1) + struct.pack("<Q", value)


def part(number, content):
    """A string, bytes or message, or packed numbers."""
    content = content.encode() if isinstance(content, str) else content
    return tag(number, 2) + varint(len(content)) + content


def real(number, value):
    return tag(number, 5) + struct.pack("<f", value)


def bits(number, value):
    """A float by its bits."""
    return tag(number, 5) + struct.pack("<I", value)


def packed(number, values):
    return part(number, b"".join(varint(value) for value in values))


def group(number, content):
    return tag(number, 3) + content + tag(number, 4)

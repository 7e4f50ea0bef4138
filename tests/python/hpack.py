"""HPACK (RFC 7541), as little as http2.py needs: literals out, all of it in."""

# Appendix A: indices 1 to 61. A name alone has an empty value.
_STATIC = [tuple(entry.partition("=")[::2]) for entry in """
:authority :method=GET :method=POST :path=/ :path=/index.html :scheme=http :scheme=https :status=200 :status=204 :status=206
:status=304 :status=400 :status=404 :status=500 accept-charset accept-encoding=gzip,deflate accept-language accept-ranges accept
access-control-allow-origin age allow authorization cache-control content-disposition content-encoding content-language
content-length content-location content-range content-type cookie date etag expect expires from host if-match if-modified-since
if-none-match if-range if-unmodified-since last-modified link location max-forwards proxy-authenticate proxy-authorization range
referer refresh retry-after server set-cookie strict-transport-security transfer-encoding user-agent vary via
www-authenticate""".split()]

# Appendix B: how many bits each byte takes, and the end. The code is canonical, so that the lengths say all.
_BITS = [int(n) for n in """
13 23 28 28 28 28 28 28 28 24 30 28 28 30 28 28 28 28 28 28 28 28 30 28 28 28 28 28 28 28 28 28 6 10 10 12 13 6 8 11 10 10 8 11 8 6 6 6 5
5 5 6 6 6 6 6 6 6 7 8 15 6 12 10 13 6 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 8 7 8 13 19 13 14 6 15 5 6 5 6 5 6 6 6 5 7 7 6 6 6 5 6 7
6 5 5 6 7 7 7 7 7 15 11 14 13 28 20 22 20 20 22 22 22 23 22 23 23 23 23 23 24 23 24 24 22 23 24 23 23 23 23 21 22 23 22 23 23 24 22 21 20
22 22 23 23 21 23 22 22 24 21 22 23 23 21 21 22 21 23 22 23 23 20 22 22 22 23 22 22 23 26 26 20 19 22 23 22 25 26 26 26 27 27 26 24 25 19
21 26 27 27 26 27 24 21 21 26 26 28 27 27 27 20 24 20 21 22 21 21 23 22 22 25 25 24 24 26 23 26 27 26 26 27 27 27 27 27 28 27 27 27 27 27
26 30""".split()]


def _canonical():
    """(bits, code) to byte."""
    codes, code, before = {}, 0, 0
    for bits, symbol in sorted((bits, symbol) for symbol, bits in enumerate(_BITS)):
        code <<= bits - before
        codes[bits, code] = symbol
        code, before = code + 1, bits
    return codes


_HUFFMAN = _canonical()


def integer(value, prefix_bits, first=0):
    """5.1; `first` holds the bits before the prefix."""
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes([first | value])
    out, value = bytearray([first | most]), value - most
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def string(value):
    value = value if isinstance(value, bytes) else value.encode()
    return integer(len(value), 7) + value


def literal(name, value):
    """6.2.2: without indexing, no Huffman code."""
    return b"\0" + string(name) + string(value)


def encode(headers):
    return b"".join(literal(name, value) for name, value in headers)


def _unhuffman(data):
    out, code, bits = bytearray(), 0, 0
    for byte in data:
        for shift in range(7, -1, -1):
            code, bits = code << 1 | byte >> shift & 1, bits + 1
            symbol = _HUFFMAN.get((bits, code))
            if symbol is not None:
                out.append(symbol)
                code = bits = 0
    return bytes(out)


class Decoder:
    """Header blocks of one connection, in their order."""

    def __init__(self):
        self._dynamic, self._room = [], 4096

    def decode(self, block):
        """Pairs of text; bytes that are none come as Latin-1."""
        headers, at = [], 0
        while at < len(block):
            first = block[at]
            if first & 0x80:
                index, at = self._integer(block, at, 7)
                headers.append(self._entry(index))
                continue
            if first & 0xe0 == 0x20:
                self._room, at = self._integer(block, at, 5)
                self._evict()
                continue
            keep = first & 0x40
            index, at = self._integer(block, at, 6 if keep else 4)
            if index:
                name = self._entry(index)[0]
            else:
                name, at = self._string(block, at)
            value, at = self._string(block, at)
            headers.append((name, value))
            if keep:
                self._dynamic.insert(0, (name, value))
                self._evict()
        return headers

    def _entry(self, index):
        return _STATIC[index - 1] if index <= len(_STATIC) else self._dynamic[index - len(_STATIC) - 1]

    def _evict(self):
        while self._dynamic and sum(len(name) + len(value) + 32 for name, value in self._dynamic) > self._room:
            self._dynamic.pop()

    @staticmethod
    def _integer(block, at, prefix_bits):
        value, at, shift = block[at] & (1 << prefix_bits) - 1, at + 1, 0
        if value < (1 << prefix_bits) - 1:
            return value, at
        while True:
            byte, at = block[at], at + 1
            value, shift = value + ((byte & 127) << shift), shift + 7
            if byte < 128:
                return value, at

    def _string(self, block, at):
        huffman = block[at] & 0x80
        length, at = self._integer(block, at, 7)
        data = block[at:at + length]
        return (_unhuffman(data) if huffman else data).decode("latin-1"), at + length

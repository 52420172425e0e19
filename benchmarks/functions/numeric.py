"""Dense algebra and a block cipher."""


def matmul(n):
    """Multiply two n × n matrices."""
    import numpy as np

    rng = np.random.default_rng(n)
    return float((rng.random((n, n)) @ rng.random((n, n))).trace())


def linpack(n, rhs):
    """Solve a dense system of n equations for `rhs` right-hand sides."""
    import numpy as np

    rng = np.random.default_rng(n)
    a = rng.random((n, n)) + n * np.eye(n)
    b = rng.random((n, rhs))
    x = np.linalg.solve(a, b)
    return float(np.abs(a @ x - b).max())


def aes(message, rounds):
    """Encrypt bytes with AES-128 in counter mode, `rounds` times over, in plain Python."""
    sbox, keys = _tables(bytes(range(16)))
    message = list(message)
    for number in range(rounds):
        out = []
        for block in range((len(message) + 15) // 16):
            counter = (number << 64 | block).to_bytes(16, "big")
            stream = _encrypt(counter, sbox, keys)
            out.extend(m ^ s for m, s in zip(message[16 * block :], stream, strict=False))
        message = out
    return bytes(message)[-16:].hex()


def _tables(key):
    """Return the S-box and the eleven round keys (FIPS 197)."""
    p = q = 1
    sbox = [0] * 256
    while True:  # p runs through the field by its generator 3, q through the inverses
        p ^= (p << 1) ^ (0x11B if p & 0x80 else 0)
        p &= 255
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 255
        if q & 0x80:
            q ^= 0x09
        x = q ^ (q << 1 | q >> 7) ^ (q << 2 | q >> 6) ^ (q << 3 | q >> 5) ^ (q << 4 | q >> 4)
        sbox[p] = (x & 255) ^ 0x63
        if p == 1:
            break
    sbox[0] = 0x63
    words = [list(key[i : i + 4]) for i in range(0, 16, 4)]
    rcon = 1
    for i in range(4, 44):
        word = list(words[i - 1])
        if i % 4 == 0:
            word = [sbox[b] for b in word[1:] + word[:1]]
            word[0] ^= rcon
            rcon = (rcon << 1) ^ (0x11B if rcon & 0x80 else 0)
        words.append([a ^ b for a, b in zip(words[i - 4], word, strict=True)])
    return sbox, [[b for word in words[i : i + 4] for b in word] for i in range(0, 44, 4)]


def _encrypt(block, sbox, keys):
    state = [b ^ k for b, k in zip(block, keys[0], strict=True)]
    shift = (0, 5, 10, 15, 4, 9, 14, 3, 8, 13, 2, 7, 12, 1, 6, 11)
    for number in range(1, 11):
        state = [sbox[state[i]] for i in shift]
        if number < 10:
            mixed = []
            for c in range(0, 16, 4):
                a0, a1, a2, a3 = state[c : c + 4]
                t = a0 ^ a1 ^ a2 ^ a3
                for a, b in ((a0, a1), (a1, a2), (a2, a3), (a3, a0)):
                    x = (a ^ b) << 1
                    mixed.append((a ^ t ^ x ^ (0x11B if x & 0x100 else 0)) & 255)
            state = mixed
        state = [s ^ k for s, k in zip(state, keys[number], strict=True)]
    return state

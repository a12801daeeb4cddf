"""What integers a quantized weight may be."""

# Bits below 8 -> the levels of a weight. Odd ones spend none on zero, which would leave one side with fewer.
LEVELS = {2: range(-3, 4, 2), 3: range(-7, 8, 2), 4: range(-8, 8)}
SAFE_WEIGHT = 64  # two products with an 8-bit activation fit in 16 bits: 2 x 255 x 64 < 2^15

"""The integers of a quantized weight."""

BITS = (8, 4, 2)  # of a weight
# Bits below 8 -> the levels of a weight. Odd ones spend none on zero, which would leave one side with fewer.
LEVELS = {2: range(-3, 4, 2), 4: range(-8, 8)}
# The seven-bit limit: a processor without VNNI adds two products with an 8-bit activation in 16 bits, where weights of
# the full range overflow (2 x 255 x 127 > 2^15) and these do not (2 x 255 x 64 < 2^15).
LARGEST_SAFE_WEIGHT = 64
# In an ONNX file: part of the names of the nodes that compute outlier channels in float; see outlier_channels.py.
BRANCH = "/outliers"

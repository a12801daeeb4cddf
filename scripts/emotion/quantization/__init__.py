"""PTQ, fake quantizers, low-bit packing, GPTQ, outlier channels and the accuracy-aware loop."""

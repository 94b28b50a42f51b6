"""compress: store a model's weights in 4 or 8 bits, in formats that other libraries load."""

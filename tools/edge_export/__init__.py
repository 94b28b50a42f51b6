"""compress: write the file that an edge runtime loads, with its parity checked in that runtime."""

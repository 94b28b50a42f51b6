"""import: bring a model in as a safetensors artifact with its licence and source."""

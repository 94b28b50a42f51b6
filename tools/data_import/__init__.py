"""import: bring data in as a record stream with its licence and source."""

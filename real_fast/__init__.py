"""real-fast: a trainer that turns a language model into a better judge."""

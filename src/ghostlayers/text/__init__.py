"""Text to tokens: corpora, their files and rows, tokenising, windows."""

"""Small programs for this repository's own pages; nothing that is installed imports them."""

"""Pages with text whose every line and place is known, to learn reading."""

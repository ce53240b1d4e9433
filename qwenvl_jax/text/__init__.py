"""Text: the vocabulary, chat turns, boxes written as text, labels drawn."""

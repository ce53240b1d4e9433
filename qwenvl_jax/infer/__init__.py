"""Generation: sampling, decoding with a cache, beam search, chat."""

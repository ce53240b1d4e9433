"""The model as pure linen modules: vision, adapter, decoder, assembly."""

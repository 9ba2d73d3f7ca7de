"""How one model is trained: configuration, data, backbones, the training loop. No search, no ensemble."""

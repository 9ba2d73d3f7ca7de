"""The control plane: searching, choosing ensembles, scoring them. CLIs are thin; the rest is tested without Ray."""

"""The detector: its two stages, its backbones, and the builders that give them torchvision's names."""

"""torchvision's objects: taken as arguments, and its detectors on fastdet's operations."""

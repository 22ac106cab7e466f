"""What a training run keeps in its folder, to be resumed, repeated and looked into."""

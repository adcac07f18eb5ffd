"""The commands of `starcast`, by what they are about."""

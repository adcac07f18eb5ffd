"""What a shop would otherwise pick: other models, tuned and tested on the same rows as ours.

They come with the `peers` extra (`pip install starcast[peers]`).
"""

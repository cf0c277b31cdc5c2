"""Models: loading a base safely, and finding an MLP, a head, a layer in any supported family."""

from editing.models.view import ModelView, Tail

__all__ = ["ModelView", "Tail"]

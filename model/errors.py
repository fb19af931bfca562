"""The errors of this folder, one tree:

ModelError                 anything about a model that its user can act on
├── SourceError            the reference names no model that can be found or fetched
├── UnsupportedModelError  found, but of an architecture or with a feature that Baton does not run
└── WeightError            found and supported, but a file or tensor is missing, damaged or misshaped

Every message names what was wrong (file, tensor, field) and what was expected.
"""


class ModelError(Exception):
    """Anything about a model that its user can act on; the message is complete by itself."""


class SourceError(ModelError):
    """The reference names no model that can be found or fetched."""


class UnsupportedModelError(ModelError):
    """The model is of an architecture, or has a feature, that Baton does not run."""


class WeightError(ModelError):
    """A weight file or tensor is missing, damaged, or of another shape or dtype than the config says."""

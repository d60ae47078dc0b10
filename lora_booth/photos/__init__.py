"""Photos: find, check, open upright in sRGB, crop, resize, judge, show on a contact sheet."""

from .audit import Audit, PhotoReport, audit_photos
from .cropping import Cropping
from .finding import find_photos, note_enlarged
from .masks import MaskSource
from .opening import open_photo
from .photo import Mask, Photo, PhotoSet, Region, Skipped
from .pixels import Crop, crop_and_resize, to_images, to_tensor
from .segmenting import MadeMask, Segmenter, make_masks
from .sheet import contact_sheet
from .square import Square, training_square

__all__ = [
    "Audit",
    "Crop",
    "Cropping",
    "MadeMask",
    "Mask",
    "MaskSource",
    "Photo",
    "PhotoReport",
    "PhotoSet",
    "Region",
    "Segmenter",
    "Skipped",
    "Square",
    "audit_photos",
    "contact_sheet",
    "crop_and_resize",
    "find_photos",
    "make_masks",
    "note_enlarged",
    "open_photo",
    "to_images",
    "to_tensor",
    "training_square",
]

"""Photos: find, check, open upright in sRGB, crop, resize, show on a contact sheet."""

from .finding import find_photos, note_enlarged
from .opening import open_photo
from .photo import Photo, PhotoSet, Region, Skipped
from .pixels import Crop, crop_and_resize, to_images, to_tensor
from .sheet import contact_sheet

__all__ = [
    "Crop",
    "Photo",
    "PhotoSet",
    "Region",
    "Skipped",
    "contact_sheet",
    "crop_and_resize",
    "find_photos",
    "note_enlarged",
    "open_photo",
    "to_images",
    "to_tensor",
]

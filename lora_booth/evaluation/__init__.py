"""How well adapters know their subject: DreamBooth's protocol, measured by DINO and CLIP or by the toybox's judge."""

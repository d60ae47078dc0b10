"""How well adapters know their subject: DreamBooth's protocol with DINO and CLIP, or with the toybox's judge."""

"""Where models come from: folders, the hub, single files; and LoRAs that change them."""

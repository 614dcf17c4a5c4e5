"""AutoLoRa: robust fine-tuning on an ordinary downstream dataset (Xu et al. 2024)."""

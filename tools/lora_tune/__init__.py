"""train: fine-tune on instruction or plain-text records, by any PEFT method or in full."""

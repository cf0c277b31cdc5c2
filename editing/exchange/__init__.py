"""What a version becomes for others, and what others' adapters become here: PEFT, Hugging Face."""

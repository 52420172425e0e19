"""Every question and how it is answered; questions.py in the folder above lists them."""

"""Task modules that nodes under test import by CELERY_IMPORTS; tests.support.checkout copies them."""

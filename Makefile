SHELL := bash

"""The parts models are made of; imported by models and by util/vis."""

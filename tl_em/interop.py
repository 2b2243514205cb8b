"""What other programs write and read: directions, dictionaries, graphs and models from elsewhere."""

from tl_em.dictionaries.loading import from_sae_lens as from_sae_lens
from tl_em.dictionaries.loading import load_dictionary as load_dictionary
from tl_em.directions.control_vectors import export_control_vector as export_control_vector
from tl_em.directions.control_vectors import import_control_vector as import_control_vector
from tl_em.directions.interchange import export_steering_vector as export_steering_vector
from tl_em.directions.interchange import import_mean_diffs as import_mean_diffs
from tl_em.directions.interchange import import_persona_vectors as import_persona_vectors
from tl_em.directions.interchange import import_refusal_direction as import_refusal_direction
from tl_em.directions.interchange import import_steering_vector as import_steering_vector
from tl_em.directions.layer_vectors import export_layer_vectors as export_layer_vectors
from tl_em.directions.layer_vectors import import_layer_vectors as import_layer_vectors
from tl_em.directions.saklas import export_saklas as export_saklas
from tl_em.directions.saklas import import_saklas as import_saklas
from tl_em.directions.steerkit import export_steerkit as export_steerkit
from tl_em.directions.steerkit import import_steerkit as import_steerkit
from tl_em.graph.exchange_reading import load_graph as load_graph
from tl_em.graph.neuronpedia import described as described
from tl_em.graph.neuronpedia import upload_graph as upload_graph
from tl_em.graph.neuronpedia import upload_latents as upload_latents
from tl_em.models.gguf import import_gguf as import_gguf
